"""The package, built from this checkout: it is whole, works, and tells nothing of where it was built."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "usr/lib/ebsd"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("package")
    done = subprocess.run([ROOT / "scripts/build-deb", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def tree(package: Path) -> Path:
    """What is in the package, as files."""
    subprocess.run(["dpkg-deb", "-R", package, package.parent / "tree"], check=True)
    return package.parent / "tree"


def field(package: Path, name: str) -> str:
    return subprocess.run(["dpkg-deb", "-f", package, name], capture_output=True, text=True, check=True).stdout.strip()


def test_the_package_says_what_it_is(package: Path) -> None:
    assert package.name == f"ebsd_{field(package, 'Version')}_{field(package, 'Architecture')}.deb"
    assert {"fuse3", "systemd (>= 252)"} <= set(field(package, "Depends").split(", "))


def test_everything_is_in_it_and_belongs_to_root(package: Path, tree: Path) -> None:
    listing = subprocess.run(["dpkg-deb", "-c", package], capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in listing.splitlines()} == {"root/root"}
    assert not re.findall(r"^.......w.*|^........[wt].*", listing.replace("lrwxrwxrwx", ""), re.MULTILINE)
    for path in (ROOT / "systemd").iterdir():
        if path.suffix in (".service", ".socket"):
            assert (tree / "usr/lib/systemd/system" / path.name).read_text() == path.read_text()
    for place in (
        "sysusers.d/ebsd.conf",
        "tmpfiles.d/ebsd.conf",
        "modules-load.d/ebsd.conf",
        "udev/rules.d/59-ebsd.rules",
    ):
        assert (tree / "usr/lib" / place).is_file()
    assert (tree / "DEBIAN/conffiles").read_text() == "/etc/ebsd/ebsd.toml\n"
    for script in ("postinst", "prerm", "postrm"):
        assert os.access(tree / "DEBIAN" / script, os.X_OK)
        for program in re.findall(r"/usr/lib/ebsd/\S+", (tree / "DEBIAN" / script).read_text()):
            assert os.access(tree / program.lstrip("/"), os.X_OK)


def test_the_source_is_in_it_whole(tree: Path) -> None:
    installed = next((tree / PREFIX / "lib").glob("python3*")) / "site-packages"
    for top in ("ebsd", "ebsctl"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".varlink", ".typed") and not path.name.startswith("_"):
                assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert list((installed / "ebsd/crypto").glob("_xts*.so"))
    assert not [p for p in installed.iterdir() if p.name in ("pip", "setuptools", "pytest", "boto3")]


def test_nothing_in_it_names_the_place_where_it_was_built(tree: Path) -> None:
    staged = re.compile(rb"/tmp/tmp\.|" + re.escape(str(ROOT)).encode())
    found = [
        path.relative_to(tree)
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix != ".so" and staged.search(path.read_bytes())
    ]
    assert not found


def test_its_programs_run_with_what_is_in_it(tree: Path) -> None:
    for name in ("ebsd", "ebsctl", "ebsd-kms"):
        script = tree / PREFIX / "bin" / name
        assert script.read_text().startswith(f"#!/{PREFIX}/bin/python\n")
    for name in ("ebsd", "ebsctl"):
        assert os.readlink(tree / "usr/bin" / name) == f"../lib/ebsd/bin/{name}"
    python = tree / PREFIX / "bin/python"
    for module in ("ebsd.daemon.main", "ebsd.daemon.keyservice", "ebsctl"):
        done = subprocess.run([python, "-I", "-m", module, "--version"], capture_output=True, text=True, cwd="/")
        assert (done.returncode, done.stderr) == (0, "")
    # each in a process of its own, which imports everything at its start
    done = subprocess.run(
        [
            python,
            "-I",
            "-c",
            "import ebsd.kms.main, ebsd.volume.process, ebsd.volume.copier, ebsd; print(ebsd.__file__)",
        ],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    )
    assert done.stdout.startswith(str(tree / PREFIX))

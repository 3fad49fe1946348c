/* A file system for tests: passes everything through to a directory, and fails the calls that a file of rules names.
 *
 *   flaky DIRECTORY RULES MOUNTPOINT
 *
 * RULES has lines "<call> <part of the path> <errno> <times>"; calls are open, read, write, fsync, fallocate. It is read
 * again when it was replaced; times counts down to 0, and -1 is for ever. Each failure is told in RULES.hits. Nothing is
 * cached by the kernel, so every read and write of a file comes here. */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 312
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define MOST 16

static int root;
static const char *rules_path;
static struct { char call[16], part[256]; int code, left; } rules[MOST];
static int rule_count;
static struct timespec loaded;
static ino_t loaded_ino;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *at(const char *path) { return path[1] ? path + 1 : "."; }

static void load(void)
{
    struct stat st;
    FILE *file;
    if (stat(rules_path, &st) || (st.st_ino == loaded_ino && st.st_mtim.tv_nsec == loaded.tv_nsec
                                  && st.st_mtim.tv_sec == loaded.tv_sec))
        return;
    loaded = st.st_mtim;
    loaded_ino = st.st_ino;
    rule_count = 0;
    if (!(file = fopen(rules_path, "r")))
        return;
    while (rule_count < MOST && fscanf(file, "%15s %255s %d %d", rules[rule_count].call, rules[rule_count].part,
                                       &rules[rule_count].code, &rules[rule_count].left) == 4)
        rule_count++;
    fclose(file);
}

/* Return what a call must fail with, 0 when it is not to fail. */
static int fault(const char *call, const char *path)
{
    int code = 0;
    pthread_mutex_lock(&lock);
    load();
    for (int i = 0; i < rule_count && !code; i++)
        if (rules[i].left && !strcmp(rules[i].call, call) && strstr(path, rules[i].part)) {
            char name[4096];
            FILE *hits;
            if (rules[i].left > 0)
                rules[i].left--;
            code = -rules[i].code;
            snprintf(name, sizeof name, "%s.hits", rules_path);
            if ((hits = fopen(name, "a"))) {
                fprintf(hits, "%s %s\n", call, path);
                fclose(hits);
            }
        }
    pthread_mutex_unlock(&lock);
    return code;
}

static int fault_of(const char *call, int fd)
{
    char link[64], path[4096];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return fault(call, path);
}

static int done(long result) { return result < 0 ? -errno : 0; }

static void *fl_init(struct fuse_conn_info *conn, struct fuse_config *cfg)
{
    (void)conn;
    cfg->use_ino = 1;
    cfg->nullpath_ok = 1;
    cfg->hard_remove = 1;
    cfg->attr_timeout = cfg->entry_timeout = cfg->negative_timeout = 0;
    return NULL;
}

static int fl_getattr(const char *path, struct stat *st, struct fuse_file_info *fi)
{
    return done(fi ? fstat(fi->fh, st) : fstatat(root, at(path), st, AT_SYMLINK_NOFOLLOW));
}

static int fl_open(const char *path, struct fuse_file_info *fi)
{
    int fd, code = fault("open", path);
    if (code)
        return code;
    if ((fd = openat(root, at(path), fi->flags & ~O_NOFOLLOW)) < 0)
        return -errno;
    fi->fh = fd;
    fi->direct_io = 1;
    return 0;
}

static int fl_create(const char *path, mode_t mode, struct fuse_file_info *fi)
{
    int fd, code = fault("open", path);
    if (code)
        return code;
    if ((fd = openat(root, at(path), fi->flags | O_CREAT, mode)) < 0)
        return -errno;
    fi->fh = fd;
    fi->direct_io = 1;
    return 0;
}

static int fl_read(const char *path, char *buffer, size_t size, off_t offset, struct fuse_file_info *fi)
{
    int code = fault_of("read", fi->fh);
    ssize_t count;
    (void)path;
    if (code)
        return code;
    count = pread(fi->fh, buffer, size, offset);
    return count < 0 ? -errno : (int)count;
}

static int fl_write(const char *path, const char *buffer, size_t size, off_t offset, struct fuse_file_info *fi)
{
    int code = fault_of("write", fi->fh);
    ssize_t count;
    (void)path;
    if (code)
        return code;
    count = pwrite(fi->fh, buffer, size, offset);
    return count < 0 ? -errno : (int)count;
}

static int fl_fsync(const char *path, int data_only, struct fuse_file_info *fi)
{
    int code = fault_of("fsync", fi->fh);
    (void)path;
    return code ? code : done(data_only ? fdatasync(fi->fh) : fsync(fi->fh));
}

static int fl_fallocate(const char *path, int mode, off_t offset, off_t length, struct fuse_file_info *fi)
{
    int code = fault_of("fallocate", fi->fh);
    (void)path;
    return code ? code : done(fallocate(fi->fh, mode, offset, length));
}

static off_t fl_lseek(const char *path, off_t offset, int whence, struct fuse_file_info *fi)
{
    off_t found = lseek(fi->fh, offset, whence);
    (void)path;
    return found < 0 ? -errno : found;
}

static int fl_truncate(const char *path, off_t size, struct fuse_file_info *fi)
{
    int fd, result;
    if (fi)
        return done(ftruncate(fi->fh, size));
    if ((fd = openat(root, at(path), O_WRONLY)) < 0)
        return -errno;
    result = done(ftruncate(fd, size));
    close(fd);
    return result;
}

static int fl_chmod(const char *path, mode_t mode, struct fuse_file_info *fi)
{
    return done(fi ? fchmod(fi->fh, mode) : fchmodat(root, at(path), mode, 0));
}

static int fl_chown(const char *path, uid_t uid, gid_t gid, struct fuse_file_info *fi)
{
    return done(fi ? fchown(fi->fh, uid, gid) : fchownat(root, at(path), uid, gid, AT_SYMLINK_NOFOLLOW));
}

static int fl_utimens(const char *path, const struct timespec times[2], struct fuse_file_info *fi)
{
    return done(fi ? futimens(fi->fh, times) : utimensat(root, at(path), times, AT_SYMLINK_NOFOLLOW));
}

static int fl_release(const char *path, struct fuse_file_info *fi)
{
    (void)path;
    return done(close(fi->fh));
}

static int fl_mkdir(const char *path, mode_t mode) { return done(mkdirat(root, at(path), mode)); }
static int fl_unlink(const char *path) { return done(unlinkat(root, at(path), 0)); }
static int fl_rmdir(const char *path) { return done(unlinkat(root, at(path), AT_REMOVEDIR)); }

static int fl_rename(const char *from, const char *to, unsigned int flags)
{
    return done(renameat2(root, at(from), root, at(to), flags));
}

static int fl_opendir(const char *path, struct fuse_file_info *fi)
{
    int fd = openat(root, at(path), O_RDONLY | O_DIRECTORY);
    if (fd < 0)
        return -errno;
    fi->fh = fd;
    return 0;
}

static int fl_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *fi,
                      enum fuse_readdir_flags flags)
{
    DIR *directory;
    struct dirent *entry;
    int fd = openat(fi->fh, ".", O_RDONLY | O_DIRECTORY);
    (void)path, (void)offset, (void)flags;
    if (fd < 0 || !(directory = fdopendir(fd)))
        return -errno;
    while ((entry = readdir(directory)))
        fill(buffer, entry->d_name, NULL, 0, 0);
    closedir(directory);
    return 0;
}

static int fl_statfs(const char *path, struct statvfs *st)
{
    (void)path;
    return done(fstatvfs(root, st));
}

static const struct fuse_operations operations = {
    .init = fl_init, .getattr = fl_getattr, .open = fl_open, .create = fl_create, .read = fl_read, .write = fl_write,
    .fsync = fl_fsync, .fsyncdir = fl_fsync, .fallocate = fl_fallocate, .lseek = fl_lseek, .truncate = fl_truncate,
    .chmod = fl_chmod, .chown = fl_chown, .utimens = fl_utimens, .release = fl_release, .releasedir = fl_release,
    .mkdir = fl_mkdir, .unlink = fl_unlink, .rmdir = fl_rmdir, .rename = fl_rename, .opendir = fl_opendir,
    .readdir = fl_readdir, .statfs = fl_statfs,
};

int main(int argc, char **argv)
{
    char *arguments[] = {argv[0], "-f", "-o", "default_permissions,allow_other", argv[3], NULL};
    if (argc != 4 || (root = open(argv[1], O_RDONLY | O_DIRECTORY)) < 0) {
        fprintf(stderr, "flaky DIRECTORY RULES MOUNTPOINT\n");
        return 2;
    }
    rules_path = argv[2];
    umask(0);
    return fuse_main(5, arguments, &operations, NULL);
}

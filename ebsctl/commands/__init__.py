"""The commands, one module per noun; ``ebsctl.cli`` imports each only when it is called."""

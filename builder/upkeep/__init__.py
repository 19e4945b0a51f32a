"""Keep a machine ready to build: `builder doctor`, `builder clean`, `builder updates`."""

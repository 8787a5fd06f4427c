"""The commands of `cosa-hf`, a module each: `--help` begins with its docstring, `main` takes the arguments."""

"""The commands of `cosa-hf`, a module each: its docstring is what `--help` begins with, its `main` takes the arguments."""

"""The ablation tables: their rows as data, their runs, their results."""

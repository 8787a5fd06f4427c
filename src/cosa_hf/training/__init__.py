"""What one run is, the loop that walks it, and what it leaves behind."""

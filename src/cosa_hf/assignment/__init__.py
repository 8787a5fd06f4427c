"""What the assignment network carries from step to step, and what it answers for a batch."""

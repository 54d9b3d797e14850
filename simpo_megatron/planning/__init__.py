"""The planner: which layouts fit on which GPUs, the memory they need and their expected speed."""

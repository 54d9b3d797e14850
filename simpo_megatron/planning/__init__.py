"""Before GPUs are rented: which layouts fit, what they need and how fast they should be."""

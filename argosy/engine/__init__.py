"""What decides: requests, the scheduler, text in and out, and the loop that drives a replica."""

"""What to know before a run: when second order pays, what a step costs, what will not transfer."""

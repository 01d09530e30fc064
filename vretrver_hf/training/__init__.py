"""Training of the three stages: entry points for `accelerate launch`, on TRL's trainers."""

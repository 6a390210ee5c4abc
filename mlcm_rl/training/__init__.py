"""What surrounds a training loop: processes, engines, seeds, progress, signals."""

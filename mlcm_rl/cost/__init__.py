"""What a stage takes, before it is run: evaluations, FLOPs, memory, time, on the devices that people have."""

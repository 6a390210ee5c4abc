"""Prompts, pictures, pairs of pictures, stored trajectories, and the points that training draws from them."""

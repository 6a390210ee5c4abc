"""Teachers, students, the sampler, and what is exported of them."""

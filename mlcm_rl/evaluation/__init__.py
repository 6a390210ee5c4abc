"""What students are measured with and beside: instruments, the rows of a table, what a row cost."""

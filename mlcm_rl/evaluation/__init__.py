"""Evaluation of students: instruments, the rows of the table, the teacher without distillation, training cost."""

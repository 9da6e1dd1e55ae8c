"""A dataset becomes a student: LoRA training that can be stopped and continued anywhere."""

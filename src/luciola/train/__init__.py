"""Training: optimiser, schedules, exact checkpoints, pre-training and supervised fine-tuning."""

"""Fine-tuning: any backbone, one recipe a task; see run.py."""

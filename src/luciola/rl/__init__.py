"""Reinforcement learning from verifiable rewards: rollouts, group advantages, the GRPO objective and its loop."""

"""What each fused operation means, in plain MindSpore."""

"""AscendC operators for MoE routing, and what builds them: see README.md."""

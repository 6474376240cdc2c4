"""Stages and schedules of the pipeline: arithmetic and pictures, without MindSpore."""

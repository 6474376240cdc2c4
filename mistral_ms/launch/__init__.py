"""Starting a run on the processes of one or more machines, and watching over it until it ends."""

from mistral_ms.launch.heartbeat import Beat, Heartbeat, end_quietly, read_beat

__all__ = ["Beat", "Heartbeat", "end_quietly", "read_beat"]

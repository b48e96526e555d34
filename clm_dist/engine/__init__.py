"""How a step is computed on many devices: replicas (DDP) or shards (ZeRO, FSDP2), one interface for the loop."""

"""The native op: built at first use from csrc/, for bfloat16 and float32 on CPUs."""

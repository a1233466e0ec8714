"""The command fused-preact bench: runs a checkout's benchmarks, and reports what they found."""

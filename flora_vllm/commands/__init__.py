"""`flora-vllm COMMAND`: one module a command, and what starts before anything is installed."""

"""The Triton op. Compiled and interpreted; NOT RUN ON HARDWARE YET."""

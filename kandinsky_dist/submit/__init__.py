"""Jobs for Slurm, from one command. Never imports torch: login nodes have none."""

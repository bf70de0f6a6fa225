# What this site needs before a job can run: edit freely. Sourced by slurm/train.sh on the job's first node; the other
# nodes inherit the resulting environment.

# module load cuda

# Python environment on a file system that all nodes see. If none is active, launch/python.sh takes the checkout's .venv.
# source /path/to/venv/bin/activate

# Network between nodes, where the default choice is wrong.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# What this site needs before a job can run: edit freely. Sourced by slurm/train.sh on the job's first node; the other
# nodes inherit the resulting environment. What is already set, by `sbatch --export` or the submitting shell, stays.

# module load cuda

# Python environment on a file system that all nodes see. If none is active, launch/python.sh takes the checkout's .venv.
# source /path/to/venv/bin/activate

# Network between nodes, where the default choice is wrong: the interface that ranks meet over, and the adapters that
# carry gradients. `NCCL_DEBUG=INFO` prints what was chosen; "NET/Socket" where InfiniBand is installed is a mistake.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# What an all-reduce between the nodes, of one GPU each, must reach before the first step, in GB/s of bus bandwidth (about
# nine tenths of an adapter's rate: 45 for 400 Gbit/s). A node that keeps it below is named, and nothing is trained.
# export KANDINSKY_MIN_GB_S=40

# Memory of the GPU: segments that grow leave fewer gaps where batches differ in shape (captions, aspect buckets).
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

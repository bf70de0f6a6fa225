"""The measurements of `launch/gpu.sh`: a plan for one GPU and a few minutes, most important steps first."""

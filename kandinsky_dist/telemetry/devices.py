"""Published peak rates of accelerators: dense bf16 matrix products, accumulated in fp32."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """One published figure."""

    name_pattern: str
    """Regular expression over the whole name that `torch.cuda.get_device_name` gives."""
    tflops: float
    source: str


# A page that prints only the rate with 2:4 sparsity is halved, and its source says so. Names are matched
# whole: a slice of a GPU ("... MIG 3g.40gb"), a cut-down variant or a laptop's chip is another device
# and has no figure here.
PEAKS = (
    Peak(
        r"NVIDIA (A100-(SXM4|PCIE)-(40|80)GB|A100 80GB PCIe)", 312.0, "NVIDIA A100 Tensor Core GPU datasheet"
    ),
    Peak(r"NVIDIA H100 80GB HBM3", 989.4, "NVIDIA H100 Tensor Core GPU architecture, table 2 (SXM5)"),
    Peak(r"NVIDIA H100 PCIe", 756.0, "NVIDIA H100 Tensor Core GPU architecture, table 2 (PCIe)"),
    Peak(r"NVIDIA H100 NVL", 835.5, "NVIDIA H100 Tensor Core GPU datasheet: 1,671 with sparsity"),
    Peak(r"NVIDIA GH200 .*", 989.5, "NVIDIA GH200 Grace Hopper datasheet: 1,979 with sparsity"),
    Peak(r"NVIDIA H200", 989.5, "NVIDIA H200 Tensor Core GPU datasheet (SXM): 1,979 with sparsity"),
    Peak(r"NVIDIA H200 NVL", 835.5, "NVIDIA H200 Tensor Core GPU datasheet (NVL): 1,671 with sparsity"),
    Peak(r"NVIDIA B200", 2250.0, "NVIDIA HGX B200 datasheet: 36 PFLOPS with sparsity for 8 GPUs"),
    Peak(r"NVIDIA GB200", 2500.0, "NVIDIA GB200 NVL72 datasheet: 360 PFLOPS with sparsity for 72 GPUs"),
    Peak(r"NVIDIA L40S", 362.05, "NVIDIA L40S datasheet"),
    Peak(r"NVIDIA L4", 121.0, "NVIDIA L4 datasheet: 242 with sparsity"),
    Peak(r"NVIDIA A40", 149.7, "NVIDIA A40 datasheet"),
    Peak(r"NVIDIA GeForce RTX 3090", 71.0, "NVIDIA Ampere GA102 GPU architecture, appendix A"),
    Peak(r"NVIDIA GeForce RTX 4090", 165.2, "NVIDIA Ada GPU architecture, appendix A"),
    Peak(r"NVIDIA GeForce RTX 5090", 209.5, "NVIDIA RTX Blackwell GPU architecture, appendix A"),
)


def peak_tflops(device_name: str) -> float | None:
    """Published dense bf16 peak of a device, TFLOP/s; None where no figure is known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
    """
    for peak in PEAKS:
        if re.fullmatch(peak.name_pattern, device_name):
            return peak.tflops
    return None

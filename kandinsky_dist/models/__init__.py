"""The networks: loading, frozen encoders, random initialisation, adapters, block-wise transforms."""

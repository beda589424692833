"""Opacus' import paths for its helpers; the modules themselves are in ``privimage_fast.dp``."""

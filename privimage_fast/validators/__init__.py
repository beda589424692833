"""``from privimage_fast.validators import ModuleValidator``, as in a script written for Opacus."""

from privimage_fast.dp.validator import (
    IllegalModuleConfigurationError,
    ModuleValidator,
    ShouldReplaceModuleError,
    UnsupportedModuleError,
)

__all__ = ["IllegalModuleConfigurationError", "ModuleValidator", "ShouldReplaceModuleError", "UnsupportedModuleError"]

# Before any module here imports Megatron, in whatever process: a launcher's checks, a rank, a test's helper.
from megalign.runtime.quiet import quiet_imports

quiet_imports()

"""Recurrences in time."""

from jaxrec.ops.time.block import block_scan
from jaxrec.ops.time.dag_scan import dag_scan
from jaxrec.ops.time.dags import Dag, DagBatch, DagShape, dag, dag_batch, shape_of
from jaxrec.ops.time.grid_rows import GridGates
from jaxrec.ops.time.grid_scan import gating_tensor, grid_scan
from jaxrec.ops.time.lti import (
    dense_conv,
    dense_scan,
    diagonal_kernel,
    diagonal_last_state,
    fft_conv,
    krylov,
    sharded_dense_conv,
)
from jaxrec.ops.time.mark_scan import mark_scan
from jaxrec.ops.time.matrix_scan import matrix_scan
from jaxrec.ops.time.mlstm import MLSTMState, mlstm_scan
from jaxrec.ops.time.running_max import running_max
from jaxrec.ops.time.scan import linear_scan
from jaxrec.ops.time.selective import selective_scan
from jaxrec.ops.time.sharded import (
    sharded_linear_scan,
    sharded_matrix_scan,
    sharded_running_max,
    sharded_selective_scan,
)
from jaxrec.ops.time.slstm import SLSTMState, slstm_scan, slstm_step
from jaxrec.ops.time.wkv import WKVState, wkv

__all__ = [
    "block_scan",
    "Dag",
    "DagBatch",
    "DagShape",
    "dag",
    "dag_batch",
    "dag_scan",
    "dense_conv",
    "dense_scan",
    "diagonal_kernel",
    "diagonal_last_state",
    "fft_conv",
    "gating_tensor",
    "grid_scan",
    "GridGates",
    "krylov",
    "linear_scan",
    "mark_scan",
    "matrix_scan",
    "MLSTMState",
    "mlstm_scan",
    "running_max",
    "selective_scan",
    "shape_of",
    "sharded_dense_conv",
    "sharded_linear_scan",
    "sharded_running_max",
    "sharded_matrix_scan",
    "sharded_selective_scan",
    "SLSTMState",
    "slstm_scan",
    "slstm_step",
    "WKVState",
    "wkv",
]

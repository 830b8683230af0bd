"""Influence functions: which training examples made the model say this."""

from curvax.apps.influence.bm25 import Candidates as Candidates
from curvax.apps.influence.bm25 import bm25 as bm25
from curvax.apps.influence.fitting import Fitted as Fitted
from curvax.apps.influence.fitting import fit as fit
from curvax.apps.influence.fitting import load as load
from curvax.apps.influence.methods import mean_eigenvalues as mean_eigenvalues
from curvax.apps.influence.methods import of_window as of_window
from curvax.apps.influence.queries import Compression as Compression
from curvax.apps.influence.queries import Queries as Queries
from curvax.apps.influence.queries import QueryInfo as QueryInfo
from curvax.apps.influence.queries import compress as compress
from curvax.apps.influence.queries import precondition as precondition
from curvax.apps.influence.scoring import Influence as Influence
from curvax.apps.influence.scoring import TopK as TopK
from curvax.apps.influence.scoring import influence as influence
from curvax.apps.influence.scoring import score as score
from curvax.apps.influence.scoring import top_k as top_k
from curvax.apps.influence.self_influence import self_influence as self_influence
from curvax.apps.influence.validation import LeaveOneOut as LeaveOneOut
from curvax.apps.influence.validation import leave_one_out as leave_one_out
from curvax.apps.influence.validation import linear_datamodeling_score as linear_datamodeling_score
from curvax.apps.influence.validation import random_subsets as random_subsets
from curvax.apps.influence.validation import retrain as retrain

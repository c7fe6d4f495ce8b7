"""The growth dynamics of the Nexusformer paper (section 5), measured on the checkpoints of grown runs.

Every fit comes with its number of points, an interval, and a comparison with a null model. Needs scipy.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

"""What the checkpoints of a run say: the growth dynamics of the Nexusformer paper, and gradients of samples.

Growth dynamics (section 5 of the paper): every fit comes with its number of points, an interval, and a
comparison with a null model; needs scipy. Gradients: which samples an unlearning run needs (RASLIK).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

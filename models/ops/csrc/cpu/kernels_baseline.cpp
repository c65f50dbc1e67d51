// The kernels for any machine of the architecture that this is compiled for.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#define VECTOR_BYTES 16

namespace deformable::baseline {
#include "kernels_impl.h"
}

// The inner loops for any processor: four lanes, which compilers map to SSE2 or NEON.
#define QLAB_LANES 4
#include "chain_kernel.hpp"

namespace qlab {

const Isa kPortable{"portable", [] { return true; }, run_chain<Lanes>};

}  // namespace qlab

#pragma once

#include <pybind11/pybind11.h>

namespace star_attention {

// Communication between ranks: NcclCommunicator, PeerMerge, RankMerge, and what the Python side
// needs beside them to do without a framework: streams, events, device memory, copies.
void bind_comm(pybind11::module_& m);

}  // namespace star_attention

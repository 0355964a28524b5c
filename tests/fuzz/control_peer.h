// The other end of a control connection, played by an input: whole frames around the input's
// messages, or raw bytes, each of them after an answer or at once.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz_input.h"
#include "transport/unique_fd.h"
#include "transport/wire/control.pb.h"

namespace presync::fuzz {

struct ControlStep {
  std::string bytes;
  bool wait = false;  // for a frame of the product's, or 20 ms, before the bytes are sent
};

struct ControlScript {
  std::vector<ControlStep> steps;
  std::vector<std::string> streams;  // what is sent on the data connections, in order
};

// The rest of `input`, piece by piece: a kind (0 message, 1 message after an answer, 2 contents of
// a data connection, 3 raw bytes) and a chunk.
ControlScript TakeScript(FuzzInput* input);

// The same from the other side, for seeds.
void PutMessage(const wire::ControlMessage& message, bool wait, FuzzOutput* out);
void PutStream(std::string_view bytes, FuzzOutput* out);

std::string FrameOf(std::string_view message);

// Plays `steps` at `socket`, then ends its direction, and reads until the product hangs up.
// `on_frame` is called for each whole frame that the product sends and that can be parsed.
void PlayControl(UniqueFd socket, const std::vector<ControlStep>& steps,
                 const std::function<void(const wire::ControlMessage&)>& on_frame);

// A pair of connected stream sockets.
struct SocketPair {
  UniqueFd product, peer;
};
SocketPair MakeSocketPair();

// Sends what fits at once; the rest is lost.
void SendAtOnce(int socket, std::string_view bytes);

}  // namespace presync::fuzz

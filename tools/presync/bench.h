// presync bench: measures what the product's own parts do on these hosts. Needs no presyncd.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tools/presync/command.h"
#include "transport/tls/tls_identity.h"

namespace presync {

// "presync bench link": a server without a peer, a client with one.
struct BenchLinkCommand {
  std::string peer;  // HOST or HOST:PORT; empty: be the server
  bool json = false;
  // Server.
  std::string listen;  // address; empty: every one
  uint16_t port = 7351;
  bool keep = false;  // serve until interrupted, not one client only
  // Both.
  std::string memory;  // ParseSize; empty: 256M for a client, 4G for a server
  std::string folder = "/dev/shm";
  TlsFiles tls;  // all or none; a server takes plain clients beside those within TLS
  // Client.
  std::string transport = "auto";
  std::string size = "64K";
  bool all_sizes = false;
  std::string pattern = "contiguous";
  uint32_t depth = 128;
  uint64_t iterations = 0;
  std::string duration = "3s";
  uint32_t tcp_streams = 4;
  uint32_t queue_pairs = 4;
  std::vector<std::string> devices;
  std::string max_write;             // ParseSize; empty: the link's own
  std::string encryption = "plain";  // "tls", or "both": in turns, with the ratio
};

// Blocks until the measurement or the server has ended. Returns the exit code, as presync's help
// has them; what is wrong goes to stderr.
int RunBenchLink(const BenchLinkCommand& command);

// The subcommand with its own subcommands.
RunCommand AddBench(CLI::App* app, CommandContext* context);

}  // namespace presync

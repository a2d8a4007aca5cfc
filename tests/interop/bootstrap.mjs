// A js-libp2p node that is a server of the Kad-DHT. It prints its address as a line of JSON when it listens; each line on
// its standard input, {"do": "ping" | "identify", "addr": multiaddr}, is answered by another. It ends with its input.
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import * as readline from 'node:readline'

// js-libp2p 3 is written for Node 22; this is all that Node 20 lacks.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((a, b) => { resolve = a; reject = b })
  return { promise, resolve, reject }
}

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    ping: ping(),
    // Loopback addresses count here, where everything is on one machine.
    dht: kadDHT({ protocol: '/ipfs/kad/1.0.0', clientMode: false, allowQueryWithZeroPeers: true, peerInfoMapper: passthroughMapper })
  }
})
const say = (what) => process.stdout.write(JSON.stringify(what) + '\n')
say({ addr: node.getMultiaddrs()[0].toString() })

for await (const line of readline.createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line)
  const signal = AbortSignal.timeout(5000)
  try {
    if (asked.do === 'ping') say({ rtt: await node.services.ping.ping(multiaddr(asked.addr), { signal }) })
    if (asked.do === 'identify') {
      const told = await node.services.identify.identify(await node.dial(multiaddr(asked.addr), { signal }))
      say({ protocols: told.protocols, agent: told.agentVersion })
    }
  } catch (error) {
    say({ error: `${error.name}: ${error.message}` })
  }
}
await node.stop()

'use strict'
// Installs the package, starts this runner's daemon, and exports what later steps need.
// A cache can only save calls: whatever goes wrong here is a warning, and the job goes on without it.

const path = require('node:path')
const fs = require('node:fs')
const os = require('node:os')
const { exportVariable, input, mask, run, saveState, say, setOutput, warn } = require('./runner.js')

const VARIABLES = {
  secret: 'CACHE_SHARED_SECRET',
  fleet: 'CACHE_FLEET',
  port: 'CACHE_LISTEN_PORT',
  'bootstrap-peers': 'CACHE_BOOTSTRAP_PEERS',
  'peer-registry': 'CACHE_PEER_REGISTRY',
  'cache-dir': 'CACHE_DIR'
}

function install (python) {
  const wanted = input('install')
  if (wanted === 'false') return true
  const here = path.resolve(__dirname, '..', '..')
  if (process.platform === 'linux' && run('cc', ['-E', '-'], { input: '#include <gmp.h>\n' }).status !== 0) {
    // libp2p is built with GMP; hosted runners let us install its headers.
    run('sudo', ['-n', 'apt-get', 'install', '-y', '-qq', 'gcc', 'libgmp-dev'])
  }
  const done = run(python, ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', wanted || `${here}[p2p,cli]`])
  if (done.status !== 0) warn(`pip could not install it: ${done.stderr.trim().split('\n').pop()}`)
  return done.status === 0
}

function routeGh (door) {
  const before = run('gh', ['config', 'get', 'http_unix_socket']).stdout.trim()
  const done = run('gh', ['config', 'set', 'http_unix_socket', door])
  if (done.status === 0) saveState('gh', JSON.stringify({ before }))
  else warn(`gh could not be told of the cache: ${done.stderr.trim()}`)
}

function main () {
  mask(input('secret'))
  const given = { CACHE_ENABLE_P2P: 'true' }
  for (const [name, variable] of Object.entries(VARIABLES)) {
    if (input(name)) given[variable] = input(name)
  }
  const python = input('python') || 'python3'
  saveState('python', python)
  if (!install(python)) return
  const wait = input('wait') || '10'
  const env = { ...process.env, ...given }
  const done = run(python, ['-m', 'httpx_p2pcache.cli', 'init', '--json', '--replace', '--wait', wait], { env })
  if (done.status !== 0) return warn(`the daemon did not start: ${done.stderr.trim()}`)
  const status = JSON.parse(done.stdout)
  // Not before: a value that cannot be used would fail the steps to come.
  for (const [variable, value] of Object.entries(given)) exportVariable(variable, value)
  saveState('running', status.started ? 'ours' : 'found')
  exportVariable('CACHE_DIR', fs.realpathSync(status.cache_dir))
  setOutput('peer_id', status.peer_id || '')
  setOutput('peer_multiaddr', status.addresses.length ? `${status.addresses[0]}/p2p/${status.peer_id}` : '')
  setOutput('door', status.door)
  // An artifact must hold something; what it says is in its name.
  const note = path.join(process.env.RUNNER_TEMP || os.tmpdir(), 'p2pcache-peer.txt')
  fs.writeFileSync(note, 'The name of this artifact leads the other runners of the fleet to this one.\n')
  setOutput('artifact', status.artifact || '')
  setOutput('artifact_path', note)
  if (input('gh') === 'true') routeGh(status.door)
  if (!status.p2p_enabled) warn(`nothing is shared: ${status.off_because || 'p2pcache verify says why'}`)
  const who = status.p2p_enabled ? `sharing as ${status.peer_id} with ${status.connected_peers} peers` : 'a cache for this job alone'
  say(`${who}; the door is ${status.door}`)
}

try {
  main()
} catch (error) {
  warn(`the cache is not used: ${error.message}`)
}

'use strict'
// Installs the package, starts this runner's daemon, and exports what later steps need.
// A cache can only save calls: whatever goes wrong here is a warning, and the job goes on without it.

const path = require('node:path')
const fs = require('node:fs')
const os = require('node:os')
const { randomUUID } = require('node:crypto')
const { addPath, exportVariable, input, jobs, mask, p2pcache, run, saveState, say, setOutput, warn } = require('./runner.js')

const IDLE_SECONDS = 21600 // a job may build for long before it asks again; the daemon ends with the job
const TEMPORARY = process.env.RUNNER_TEMP || os.tmpdir()
const NODE_SECONDS = 30 // for a node to know who it is: it imports libp2p first

const VARIABLES = {
  secret: 'CACHE_SHARED_SECRET',
  fleet: 'CACHE_FLEET',
  port: 'CACHE_LISTEN_PORT',
  'bootstrap-peers': 'CACHE_BOOTSTRAP_PEERS',
  'peer-registry': 'CACHE_PEER_REGISTRY',
  'cache-dir': 'CACHE_DIR'
}

// The Python that has the package from now on; undefined if none has.
function installed (python) {
  const wanted = input('install')
  if (wanted === 'false') return python
  const here = path.resolve(__dirname, '..', '..')
  if (process.platform === 'linux' && run('cc', ['-E', '-'], { input: '#include <gmp.h>\n' }).status !== 0) {
    // libp2p is built with GMP; hosted runners let us install its headers.
    run('sudo', ['-n', 'apt-get', 'install', '-y', '-qq', 'gcc', 'libgmp-dev'])
  }
  const pip = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', wanted || `${here}[p2p,cli]`]
  let done = run(python, pip)
  if (done.status !== 0 && done.stderr.includes('externally-managed-environment')) { // as Debian's own Python is
    const apart = path.join(TEMPORARY, 'p2pcache-python')
    done = run(python, ['-m', 'venv', apart])
    python = path.join(apart, 'bin', 'python')
    if (done.status === 0) done = run(python, pip)
  }
  if (done.status === 0) return python
  const lines = `${done.stderr}\n${done.stdout}`.trim().split('\n')
  warn(`pip could not install it: ${lines.find(line => line.toLowerCase().startsWith('error')) || lines.pop()}`)
}

// Has a daemon running, in place of one that is for another fleet unless other jobs of this machine use that.
function init (python, wait, env, given) {
  const order = ['init', '--json', '--idle', String(IDLE_SECONDS), '--wait', wait]
  const done = p2pcache(python, order, { env })
  if (done.status === 0 || !done.stderr.includes('another secret or fleet')) return done
  const at = p2pcache(python, ['status', '--json'], { env })
  if (at.status === 0 && jobs(JSON.parse(at.stdout).cache_dir).length > 0) {
    env.CACHE_DIR = given.CACHE_DIR = path.join(TEMPORARY, 'p2pcache')
    return p2pcache(python, order, { env })
  }
  return p2pcache(python, [...order, '--replace'], { env })
}

function pause () {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 250)
}

function routeGh (door) {
  const before = run('gh', ['config', 'get', 'http_unix_socket']).stdout.trim()
  const done = run('gh', ['config', 'set', 'http_unix_socket', door])
  if (done.status === 0) saveState('gh', JSON.stringify({ before }))
  else warn(`gh could not be told of the cache: ${done.stderr.trim()}`)
}

function main () {
  mask(input('secret'))
  const given = { CACHE_ENABLE_P2P: process.env.CACHE_ENABLE_P2P || 'true' }
  for (const [name, variable] of Object.entries(VARIABLES)) {
    if (input(name)) given[variable] = input(name)
  }
  const python = installed(input('python') || 'python3')
  if (!python) return
  saveState('python', python)
  let wait = input('wait') || '10'
  if (!(Number(wait) >= 0 && Number(wait) <= 300)) {
    warn(`wait is to be a number of seconds from 0 to 300, not ${wait}: 10 is taken`)
    wait = '10'
  }
  const env = { ...process.env, ...given }
  const done = init(python, wait, env, given)
  if (done.status !== 0) return warn(`the daemon did not start: ${done.stderr.trim()}`)
  let status = JSON.parse(done.stdout)
  const started = status.started
  for (const until = Date.now() + NODE_SECONDS * 1000; status.p2p_enabled && !status.peer_id && Date.now() < until; pause()) {
    const now = p2pcache(python, ['status', '--json'], { env })
    if (now.status === 0) status = { ...status, ...JSON.parse(now.stdout) }
  }
  // Not before: a value that cannot be used would fail the steps to come.
  const directory = fs.realpathSync(status.cache_dir)
  for (const [variable, value] of Object.entries({ ...given, CACHE_DIR: directory })) exportVariable(variable, value)
  const scripts = run(python, ['-c', 'import sysconfig; print(sysconfig.get_path("scripts"))']).stdout.trim()
  if (scripts) addPath(scripts)
  // Of the jobs that use it the last one stops it, if one of them has started it.
  const job = path.join(directory, 'jobs', randomUUID())
  fs.mkdirSync(path.dirname(job), { recursive: true, mode: 0o700 })
  fs.writeFileSync(job, '', { mode: 0o600 })
  if (started) fs.writeFileSync(path.join(directory, 'jobs', 'started'), String(status.pid), { mode: 0o600 })
  saveState('job', job)
  setOutput('peer_id', status.peer_id || '')
  setOutput('peer_multiaddr', status.addresses.length ? `${status.addresses[0]}/p2p/${status.peer_id}` : '')
  setOutput('door', status.door)
  // An artifact must hold something; what it says is in its name.
  const note = path.join(TEMPORARY, 'p2pcache-peer.txt')
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

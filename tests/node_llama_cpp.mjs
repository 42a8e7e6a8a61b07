// What llama.cpp makes of a GGUF file: reads a request as JSON on standard input, writes the answer as JSON.
//
//   request: {model, lora, texts, prompts, newTokens, contextSize}    prompts: token ids of each
//   answer:  {tokens, addsBos, logits, continuations}    logits: of every position of every prompt, by token id
//
// Argument: the folder that holds node_modules. Called by node_llama_cpp.py.

import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";
import {text} from "node:stream/consumers";

const require = createRequire(pathToFileURL(`${process.argv[2]}/`));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(require.resolve("node-llama-cpp")));

const request = JSON.parse(await text(process.stdin));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: request.model});
const context = await model.createContext({
    contextSize: request.contextSize,
    lora: request.lora ?? undefined,
    threads: 1, // two would spin for each other on a busy machine
    flashAttention: false,
    experimentalKvCacheKeyType: "F32", // so that only the file's own rounding shows
    experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();

function byToken(result) {
    const row = new Array(result.next.logits.size);
    for (const [token, logit] of result.next.logits)
        row[token] = logit;
    return row;
}

async function evaluate(tokens) {
    const results = await sequence.controlledEvaluate(
        tokens.map((token) => [token, {generateNext: {logits: true}}])
    );
    return results.map(byToken);
}

function argmax(row) {
    return row.reduce((best, logit, index) => (logit > row[best] ? index : best), 0);
}

const logits = [], continuations = [];
for (const prompt of request.prompts) {
    await sequence.clearHistory();
    const rows = await evaluate(prompt);
    logits.push(rows);
    const continuation = [argmax(rows.at(-1))];
    while (continuation.length < request.newTokens && !model.isEogToken(continuation.at(-1)))
        continuation.push(argmax((await evaluate([continuation.at(-1)]))[0]));
    continuations.push(continuation);
}
const tokens = request.texts.map((part) => model.tokenize(part, true));
process.stdout.write(JSON.stringify({tokens, addsBos: model.tokens.shouldPrependBosToken, logits, continuations}) + "\n", () => process.exit(0));
